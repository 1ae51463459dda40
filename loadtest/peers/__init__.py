"""Other model servers, each doing the work of the service, for a fair comparison."""
