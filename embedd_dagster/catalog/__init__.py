"""The control database: what should be, what is being done, what is live."""
