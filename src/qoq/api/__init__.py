"""What OpenAI's API says and hears, shared by all that speak it: the server and batches.

protocol  the bodies of requests            fields    types of what may be very long
checks    what of them is refused by name
sampling  their fields to SamplingParams    rules     those about which tokens are drawn
forms     the form that a text must have    messages  conversations as templates expect them
cut       prompts cut short                 logprobs  tokens with their log-probabilities
calling   tools: what the model must write, and what calls look like in an answer
"""
