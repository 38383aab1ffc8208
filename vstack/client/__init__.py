"""What a user of the mesh does: cut, upload, list, fetch, play.

No import of `vstack.node`: everything a client knows of a node came over the wire.
"""
