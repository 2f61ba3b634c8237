"""python -m camelid"""

from camelid.cli import main

main()
