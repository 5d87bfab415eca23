"""Files of an adapter: written whole, with a checksum and a model card, and checked before they are used."""
