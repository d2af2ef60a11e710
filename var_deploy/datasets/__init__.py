"""Image sets: many labelled images in shards, the same bytes whoever makes which of them.

    spec      what decides every byte of a set: bundle, settings, labels, how it is cut
    shards    one shard, drawn by a pipeline
    formats   its file, a tar or Parquet: packed, and read again
    folder    a set on disk: what is there, what is missing, what is damaged
    work      what one process does: the shards of its share that are missing
    npz       all images as one array, for programs that compute FID

Needs what runs the bundle, and nothing else.
"""
