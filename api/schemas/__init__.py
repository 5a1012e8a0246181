"""Bodies and answers, a file a resource: field names are the contract's."""
