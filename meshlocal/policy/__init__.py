"""Pure decisions: the model, the picker, the config. Standard library and msgspec only."""
