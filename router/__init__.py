"""Which experts serve a request: features, centres, neighbours, mix."""
