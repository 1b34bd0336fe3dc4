"""What a trainer returned, as one ONNX graph over raw features."""
