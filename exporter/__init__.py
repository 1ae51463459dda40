"""A checkpoint to an ONNX bundle, proven equal to the checkpoint."""
