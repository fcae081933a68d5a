"""Several hosts on one machine: network namespaces with addresses and files of their own. Linux and root only."""
