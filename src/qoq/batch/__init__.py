"""Files of requests in OpenAI's batch format, answered by an engine in this process.

lines     a line of the input to a Job, or to an error; an Output to a line of the result
results   the result file: resumable, whole when it appears
run       all of it: reads lines, keeps the engine full, writes what is finished
"""
