"""A small HTTP service around a pipeline: `create_app` in `app`, its schemas in `schemas`.

    routes    app, answers, events, docs: HTTP, and nothing else
    ask       what a body asks for, checked: a `GenerationRequest`
    backend   the interface between them and what draws: submit a `GenerationRequest`, get events
    line      who waits, and where he stands
    batches   which works share a batch, and the drawing of one
    queue     the backend of one process: a bounded queue in front of one `Pipeline`

Another deployment replaces `queue` alone. Needs the extra `serve`.
"""
