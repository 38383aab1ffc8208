"""Nodes that keep videos, in one process and in virtual time: the true keeper, mender and collector over
disks, registers and a network that are made up and fail as a seed says.

`loop` is the clock, `disk` a node's pieces, `registers` what a quorum holds, `ledger` what must hold of all
of them together, `mesh` what one node or client can reach, `clients` who uses the mesh, `profile` what a seed
draws, `world` the nodes and how they fail, `scene` a world for one schedule by hand, `main` runs seeds, and
`mutants` are keepers that are wrong on purpose.
"""
