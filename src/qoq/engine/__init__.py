"""From requests to tokens: batches over the paged KV cache.

request   SamplingParams, Request (a prompt on its way) and Output     engine   Engine.step
"""
