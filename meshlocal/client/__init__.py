"""The discovery client: a watch that never ends. Runs in any anyio app."""
