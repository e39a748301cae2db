"""Reports: what a cache or a run is, as one HTML file that a browser opens without a network.

In: a finished cache, or folders of runs. Out: HTML. Invariant: nothing that was read is changed, and every text that
came from a data set (keys, class names) is escaped before it reaches the page.
"""
