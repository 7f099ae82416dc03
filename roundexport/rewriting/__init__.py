"""The second door: an artifact's integers put into a float graph that somebody else's exporter made.

    rewrite.py            the verb: find, replace, write aside, prove, compare, rename
    layers.py             the artifact's layers with their float values, and the floats that tuning changed
    matching.py           where a layer's values stand in a graph's constants, rows of a packed one among them
    onnx_graph.py         an ONNX graph: its constants, who reads them, and the integers in their place
    openvino_graph.py     the same for an OpenVINO graph
    feeds.py comparing.py inputs for any graph, and outputs held against the graph with the dequantized weights

What is not a tuned weight stays as it was.  Packages of `export` are faster, as their attention and norms are fused;
this is for models that capture refuses, and for graphs that exist already.
"""
