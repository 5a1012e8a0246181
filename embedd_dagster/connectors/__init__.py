"""The external systems that embedd speaks to: one package for each."""
