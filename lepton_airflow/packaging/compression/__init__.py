"""Does a smaller number format pay for this model on this CPU?

::

    convert.py   what can be gained in a graph, and the graph in another number format   inspect, prepare, convert
    quality.py   how much worse is it?                                                    Judge
    latency.py   how many times as fast is it?                                            time_side_by_side
    compare.py   which one to ship?                                                       compare

All work on ONNX bytes and arrays, so that models of any shape can be compared.
"""
