"""Image sets and the HTTP service on several machines, with Ray.

    connect    connects to a Ray cluster, or starts one on this machine
    place      copies a bundle to the nodes that need it, once per node
    devices    what a worker needs of a node, and how many workers have room
    worker     the actor that generates shards
    sets       writes an image set, one shard per call of a worker
    service    deploys the HTTP service on Ray Serve
    replica    the deployment that generates images
    backend    the ingress's backend, which sends requests to the replicas
    replicas   the number of replicas

Needs the extra `ray`, on every node and in the same version.
"""
