"""What keeps videos as they are to be kept: repair, switches, moves, garbage.

The keeper of a video is the first live member of its group. It compares the registers with the nodes
and the policy, and changes them by compare-and-swap alone: two keepers at once are slow, never unsafe.
What may be dropped, each holder decides for itself. `plan`, `garbage` and `heat` are pure.
"""
