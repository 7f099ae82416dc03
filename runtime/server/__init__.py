"""The server: packages behind the HTTP interface of OpenAI, for the ``openai`` client, ``curl`` and the page.

    request ─▶ security ─▶ app ─▶ chat | completions | embeddings | rerank ─▶ answers ─▶ Scheduler ─▶ events ─▶ sse

    settings      what a server may be asked for           models     the opened packages, by name
    requests      bodies, strictly typed                   wishes     bodies to GenerationSettings
    errors        OpenAI's error form, statuses            metrics    Prometheus, by OpenTelemetry's names

Everything that takes longer than a moment (templates, tokenization, engines) runs in threads; the event loop only moves
bytes.  Needs the extra ``serve``; nothing outside this folder imports its libraries.
"""
