"""What is a model as files?

::

    package.py     the directory, and predictions from it             ModelPackage, write_package
    card.py        what its model.json says                           ModelCard, Touched
    schema.py      what goes into its graph and what comes out        Schema, features_of
    session.py     how its graph is run                               open_session, predict_onnx
    touched.py     which rows it has touched                          overlap, touched_rows, untouched_by_id
    export/        how a fitted model becomes its graph
    compression/   whether a smaller number format pays
"""
