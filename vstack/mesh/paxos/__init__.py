"""ChunkPaxos: one compare-and-swap Paxos register per key, no elected leader, no log.

Pure: messages in, messages out. Time is an argument, randomness is handed in, and what must be
on disk before a reply leaves is in `Acceptor.dirty`. The same code runs in the simulator.
Source: CASPaxos (Rystsov 2018, arXiv 1802.07000); docs/protocol.md.
"""
