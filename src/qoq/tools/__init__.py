"""Tools: the calls that models write into their text, found as the text grows. Pure Python.

calls    what a parser finds: content and calls        scan     one call's JSON, as it comes
parsers  one for each way that models write calls      choose   which of them a model needs
machine  what the parsers share
request  tools and tool_choice of a request, and the structure that forces a call
strict   the same for calls that a model may make: forms of the text, words or calls
schemas  JSON schemas of calls, put together from those of functions
reader   a text of an answer by such a plan
"""
