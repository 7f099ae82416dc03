"""The standard dialect: a graph of ONNX's own operators alone, for runtimes other than ONNX Runtime.

    linear       MatMul(x, DequantizeLinear(codes [K, N], scales [G, N][, zero points], axis 0, block_size))
    embedding    rows of the codes looked up, then turned to floats: Gather, Cast, Sub, Mul
    attention    MatMul, Softmax, MatMul, with the KV cache as inputs that every step makes longer
    norms        Pow, ReduceMean, Sqrt, Div, Mul

The integers are the artifact's, in INT4/UINT4 or INT8/UINT8 (weight_layout.py).  The graph passes onnx.checker, is of
opset 21, and gives the same logits on ONNX Runtime and through OpenVINO's ONNX frontend.  ONNX Runtime fuses
DequantizeLinear and MatMul to its own MatMulNBits where the weight is [K, N], which is why it is turned so; what it
does not fuse is attention, so a decode step copies the cache and costs more than in the default dialect.

Decoders (windows, chunks, sinks, biases), mixtures of experts, encoders, heads and encoders of images have it; states
of convolutions and linear attention, and models of an encoder and a decoder, do not and are refused.
"""
