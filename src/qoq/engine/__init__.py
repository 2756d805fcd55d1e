"""From requests to tokens: batches over the paged KV cache.

request    SamplingParams, Request (a prompt on its way) and Output
scheduler  which requests run, and their pages      line   those that wait
rows       what runs, as tensors                    engine Engine.step
stats      gauges and counters                      report what an engine starts with
"""
