"""A deterministic simulator of the Paxos core: real acceptors and proposers, fake disks, network and clients.

The same seed and profile give the same run, event by event. No clock, thread or socket.
"""
