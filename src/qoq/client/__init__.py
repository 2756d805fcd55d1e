"""The other end of the wire: asks any OpenAI-compatible server over HTTP.

events   server-sent events out of bytes      answers   chunks of an answer, of either route
api      Endpoint, and streams of answers, plain and async
"""
