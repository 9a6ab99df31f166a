"""Imported only by the server that a run's processes are forked from: it ends with the run.

The server looks for the end of its parent between two requests, but not while it imports what it
preloads, which takes seconds, and it takes its time to exit.
"""

from hfpp.train.lifetimes import end_with_parent

end_with_parent()
