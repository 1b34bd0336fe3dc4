"""How does a fitted model become one ONNX graph over raw features?

::

    fitted.py    what a trainer may return, and what is asked of it   as_fitted
    sklearn.py   an estimator or Pipeline, by skl2onnx
    steps.py     the number format of each of its steps
    torch.py     a module, by torch's exporter, behind a fitted transformer
    onnx.py      a model that is ONNX already
    network.py   what the last two have in common
    graph.py     the form that every graph gets in the end
"""
