"""Phase 1: photographs through an encoder into a store, and reading what it left."""
