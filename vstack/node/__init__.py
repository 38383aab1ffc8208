"""What one node does: the process, its votes on disk, its store of pieces.

No import of `vstack.client`: a node never reads what it stores as video.
"""
