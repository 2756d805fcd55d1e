"""How much accuracy is left: perplexity, KL divergence, top-1 agreement (QServe section 6.2).

texts        files and datasets -> token windows     perplexity   windows -> figures of one model
simulate     quantize, judge, throw away             table        the accuracy tables of the docs
render       tables as markdown
"""
