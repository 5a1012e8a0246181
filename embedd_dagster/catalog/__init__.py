"""The catalog: what should exist, what is being done, and what is live."""
