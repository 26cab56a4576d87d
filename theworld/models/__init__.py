"""The frozen models, the trained projection, and how a packed sequence goes through them."""
