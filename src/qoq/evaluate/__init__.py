"""How much accuracy is left: perplexity, KL divergence, top-1 agreement (QServe section 6.2).

texts        files and datasets -> token windows     perplexity   windows -> figures of one model
simulate     quantize, judge, throw away             cases        which rows the tables have
table        cases -> rows of figures                render       rows as markdown, in documents
provenance   command, commit, date, hardware
"""
