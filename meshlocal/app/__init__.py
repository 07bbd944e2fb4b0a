"""Composition roots: what runs in which nursery, and how the parts are joined."""
