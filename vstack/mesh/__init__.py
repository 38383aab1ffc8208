"""How nodes talk and agree: messages, sockets, Paxos registers, configuration, placement.

No disk and no video here, and no import of `vstack.node` or `vstack.client`.
"""
