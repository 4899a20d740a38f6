#!/bin/sh
# rustc as cargo's wrapper calls it: the objects are the same bytes wherever they are made. cargo gives each crate a number
# that its symbols have; that of a crate outside of the workspace's own folder, as lb-common is here, follows from its
# absolute path.
rustc=$1
shift
case " $* " in
*" --crate-name lb_common "* | *" --crate-name nohop_"*)
    for argument; do
        shift
        case $argument in
        metadata=*) argument=metadata=nohop ;;
        esac
        set -- "$@" "$argument"
    done
    ;;
esac
exec "$rustc" "$@"
