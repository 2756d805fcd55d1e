"""What OpenAI's API says and hears, shared by all that speak it: the server and batches.

forms     response_format and its relatives to StructuredOutputsParams
calling   tools of a request: what the model must write, what calls look like in an answer
logprobs  tokens with their log-probabilities
"""
