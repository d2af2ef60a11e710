"""The HTTP service around a pipeline: `create_app` in `app`, its schemas in `schemas`.

    app, answers, events, docs   the routes, and how images and events are encoded
    guard, hosts, connections    what is checked before a route runs, and how long a client may take
    bodies, validate             from the bytes of a body to a valid `GenerationRequest`
    backend                      the interface of what generates: a request goes in, events come out
    request_queue                the client-facing half of every backend
    batches                      which requests share a batch, and the generation of one
    queue                        the backend of one process, with one `Pipeline`

A deployment on several machines (`cluster.backend`) replaces `queue`. Needs the extra `serve`.
"""
