"""The command line; its verbs by what they are about."""

from moesaic.cli.main import app as app
from moesaic.cli.main import main as main
