"""Checkpoints in other evaluation harnesses: lmms-eval and VLMEvalKit."""
