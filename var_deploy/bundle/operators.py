"""The list of operators that graphs of a bundle may use.

The exporter writes only these; a graph with any other operator is refused before an inference
library reads it. None of them contains a graph, loops, or reads a file.
"""

from __future__ import annotations

OPSET = 20  # the newest that TensorRT 10.3 parses; the first with a native tanh GELU

# of fp32 and fp16 graphs, all of which TensorRT 10.3 takes
FLOAT_OPERATORS = frozenset(
    {
        *("Add", "And", "ArgMin", "Cast", "Clip", "Concat", "Conv", "Div", "Equal", "Exp"),
        *("Expand", "Gather", "Gelu", "Greater", "GreaterOrEqual", "Identity"),
        *("InstanceNormalization", "LayerNormalization", "LessOrEqual", "MatMul", "Max", "Min"),
        *("Mul", "Or", "Pad", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceSum"),
        *("ReduceSumSquare", "Reshape", "Resize", "Shape", "Sigmoid", "Slice", "Softmax"),
        *("Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    }
)
INT8_OPERATORS = frozenset(
    {
        *("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv"),
        "QuantizeLinear",
    }
)
OPERATORS = FLOAT_OPERATORS | INT8_OPERATORS
