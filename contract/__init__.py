"""What training promises and serving relies on: record codec, feature encoding, bundle manifest."""
