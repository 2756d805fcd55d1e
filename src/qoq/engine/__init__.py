"""From requests to tokens: batches over the paged KV cache.

engine     Engine.step                                 request    SamplingParams, Request, Output
scheduler  which requests run, and their pages         line       those that wait
plan       what a step reads                           rows       what runs, as tensors
feed       an engine that is kept full                 speculative   guesses by prompt lookup
stats      gauges and counters                         report     what an engine starts with
sampler    logits to tokens, and what is told of them  logits     what requests want done to logits
penalties  on what is there already                    logprobs   of tokens, of prompts, with ranks
structured, structured_params   the text's form        checks     values a request may bring
choices    n texts for a prompt                        defaults   what a model asks for itself
"""
