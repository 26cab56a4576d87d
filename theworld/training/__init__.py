"""Phase 2: training the projection from the cache."""
