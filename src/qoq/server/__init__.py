"""OpenAI-compatible HTTP in front of the engine.

The way of a request: middleware (key, size, id) -> a route (completions, chat, responses, ...) ->
prompts (text to ids) and sampling (fields to SamplingParams) -> async_engine -> sse or one answer.
"""
