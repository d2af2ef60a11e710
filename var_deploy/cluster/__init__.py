"""Beyond one machine, on Ray: its scheduler, its object store, its failure handling.

    connect   joins a cluster, or starts one on this machine
    place     brings a bundle to the nodes that draw from it, once each
    devices   what a worker needs of a node, and for how many there is room
    worker    the actor that draws shards
    sets      image sets, a shard a call
    measure   what that adds to drawing
    service   the HTTP service as replicas of Ray Serve, and replicas, how many
    replica    the replicas that draw; backend, how the one that answers asks them

Needs the extra `ray`, on every node and in the same version.
"""
