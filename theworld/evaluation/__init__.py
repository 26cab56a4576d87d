"""Phase 3: predictions, metrics from them, and a verdict."""
