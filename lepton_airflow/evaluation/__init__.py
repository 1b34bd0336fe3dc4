"""Is a model good, and has the world moved?

::

    rows.py     the rows that a model is judged on
    plots.py    the pictures of an evaluation
    report.py   an evaluation as one page
    drift.py    how far each column has moved away from what the model learnt
"""
